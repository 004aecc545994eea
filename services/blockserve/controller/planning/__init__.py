"""The leader's work: from demand, wishes and live workers to a placement that is written."""

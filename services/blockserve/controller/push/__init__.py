"""Registrations from elsewhere: what was sent, what was proved, what a pusher may do."""

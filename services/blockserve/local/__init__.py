"""A whole cluster on one machine: the processes behind `blockzoo up` and `blockzoo down`."""

"""What people and machines are told: the log. The rule of this room: it reports and changes nothing."""

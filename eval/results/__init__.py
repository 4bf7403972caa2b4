"""What a result file holds and how it is read and written: the ground floor of the measurements."""

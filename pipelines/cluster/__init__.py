"""What every flow needs of a Ray cluster: its capacity, mapped tasks, retries, and Ray's private names."""

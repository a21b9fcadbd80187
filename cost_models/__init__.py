"""What each unit costs under each scheme on a device. Bytes so far; one cost a file."""

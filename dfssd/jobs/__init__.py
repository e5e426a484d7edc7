"""What the commands do: a file each, which reads the command line and calls. What is slow to import waits until then."""

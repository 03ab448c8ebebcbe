"""What came packed, read as a stream and put into a folder that nothing of it may leave."""

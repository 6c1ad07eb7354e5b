"""What reproduce.py is made of: the table file, its runner, its summary."""

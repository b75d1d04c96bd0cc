"""Files: where they are, which rows they hold, and how they are read and written."""

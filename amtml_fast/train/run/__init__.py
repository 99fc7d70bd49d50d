"""One training: the job, its preparation, the loop, and the folder that it leaves."""

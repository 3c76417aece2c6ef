"""How is one kind of work done? One file per kind; task_executor.py holds what they share."""

"""What executors/crawl.py is made of; no executor is looked for in here."""

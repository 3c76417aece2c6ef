"""What app_sync and data_sync need to talk to AppsFlyer. A library: executors are the files of the folder above."""

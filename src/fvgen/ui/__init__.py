"""`fvgen ui`: a page in the browser for what `fvgen generate` and `fvgen reconstruct` do.

serve (folder, port, server) -> page (what stands on it) -> sessions (a folder for every visitor) -> running (a process
for every job) -> work (the same functions as on the command line). limits and guard judge what comes in.
"""

"""The candidates in Python. `build` makes the app; a module each, so that none has another one's imports in its memory."""

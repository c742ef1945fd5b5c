"""From files to token ids: `load` reads them, `formats` understands a row, `chat` renders it, `show` prints it."""

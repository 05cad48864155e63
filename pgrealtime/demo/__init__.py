"""The command ``demo``: a throwaway PostgreSQL, an application that writes, a page to watch."""

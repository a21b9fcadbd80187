"""What lasts: jobs, maps, measurements and tables in a database. Knows no model and no search."""

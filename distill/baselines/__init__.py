"""The methods of the comparison, each a file: its equations, its wiring, its defaults, what it costs."""

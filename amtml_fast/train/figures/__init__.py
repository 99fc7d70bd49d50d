"""Tables and pictures. Pure: numbers in, text or PNG out."""

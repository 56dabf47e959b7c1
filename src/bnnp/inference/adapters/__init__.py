"""A functional in the forms that other libraries ask for. Each adapter needs its library only where it is used."""

"""Ways for payload to go from one executor to another, behind one port."""

"""Networks for instances of either kind: bridges, addresses, names, published ports, and what is removed at the end."""

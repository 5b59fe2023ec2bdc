"""What an attack and a defense are."""

"""The ground: types, errors, random streams, locks. Imports nothing else of the project."""

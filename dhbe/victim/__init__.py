"""Where suspects come from, and where trained victims are stored."""

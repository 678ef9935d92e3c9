"""Records as text, figures and HTML. Nothing is computed here."""

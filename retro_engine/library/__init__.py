"""Live documents: added, replaced, deleted and searched while they are read; durable in one folder."""

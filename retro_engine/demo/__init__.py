"""The demos: what retrieval gives on generated facts and on the user's text."""

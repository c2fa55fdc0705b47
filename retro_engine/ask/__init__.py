"""Questions about a user's own documents: a small model that was taught to read, the documents, the answer and where it stands."""

"""Judge videos: each judge is a small class that gives every video one number."""

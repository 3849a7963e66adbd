"""What is read: images, texts, chats and records, as examples for a task."""

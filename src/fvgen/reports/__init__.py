"""What people look at: scores, the demo, pages."""

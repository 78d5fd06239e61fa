"""What the image knows of itself, and how its programs start sooner."""

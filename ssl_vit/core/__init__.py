"""What everything else stands on: settings, files, text, processes."""

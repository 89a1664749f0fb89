"""Reports on runs for people to read: pages, pictures, tables, and uploads to the hub."""

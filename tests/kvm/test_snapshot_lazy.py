"""A real Linux that goes on with memory from elsewhere: files plain and packed, processes of ours and of others."""

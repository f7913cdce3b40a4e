"""Load SAEs from folders or from the Hugging Face Hub, and push them to the Hub."""

"""Images and latents in formats that users have, through each format's library; docs/data.md lists the formats."""

"""kvcompress with the programs that hold KV caches; each module needs the library of its name."""

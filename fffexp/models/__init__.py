"""Networks that take a layer factory and know no concrete layer."""

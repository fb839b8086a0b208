"""Reports of checks: data, HTML, comparison with an earlier one."""

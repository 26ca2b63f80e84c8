//! What this process has used: CPU time and resident memory.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// CPU time of all threads of this process since its start, user and system.
#[must_use]
pub fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// Resident memory of this process in bytes (`VmRSS`), or 0 where `/proc` is not there.
#[must_use]
pub fn resident_bytes() -> u64 {
    status("VmRSS:")
}

/// What of it is not a copy of a file, as code is (`RssAnon`).
#[must_use]
pub fn anonymous_bytes() -> u64 {
    status("RssAnon:")
}

/// The most that was resident at a time (`VmHWM`).
#[must_use]
pub fn most_resident_bytes() -> u64 {
    status("VmHWM:")
}

fn status(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    let kib = line.and_then(|rest| rest.split_whitespace().next()).and_then(|kib| kib.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_grows_with_work() {
        let before = cpu_time();
        let mut sum = 0_u64;
        while cpu_time() == before {
            sum = std::hint::black_box(sum.wrapping_add(1));
        }
        assert!(cpu_time() > before);
        assert!(resident_bytes() > 100_000);
        assert!(most_resident_bytes() >= resident_bytes());
        assert!((1..resident_bytes()).contains(&anonymous_bytes()));
    }
}

//! The hash functions of consistent hashing.

use mesh_xds::resource::HashFunction;
use twox_hash::XxHash64;

/// XXH64 with seed 0: of requests (gRFC A42), and of a ring's entries by default.
#[inline]
pub(crate) fn xxh64(bytes: &[u8]) -> u64 {
    XxHash64::oneshot(0, bytes)
}

/// XXH64 with another seed.
pub(crate) fn xxh64_seeded(seed: u64, bytes: &[u8]) -> u64 {
    XxHash64::oneshot(seed, bytes)
}

/// The hash of a ring's entry.
pub(super) fn of_entry(function: HashFunction, bytes: &[u8]) -> u64 {
    match function {
        HashFunction::XxHash => xxh64(bytes),
        HashFunction::MurmurHash2 => murmur2(bytes),
    }
}

/// The seed of libstdc++'s `std::hash`, which Envoy keeps.
const STD_SEED: u64 = 0xC70F_6907;
const M: u64 = 0xC6A4_A793_5BD1_E995;

/// MurmurHash64A as in libstdc++ (Envoy `MurmurHash::murmurHash2`).
fn murmur2(bytes: &[u8]) -> u64 {
    let mix = |v: u64| v ^ (v >> 47);
    let mut hash = STD_SEED ^ (bytes.len() as u64).wrapping_mul(M);
    let mut words = bytes.chunks_exact(8);
    for word in &mut words {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(word);
        hash ^= mix(u64::from_le_bytes(bytes).wrapping_mul(M)).wrapping_mul(M);
        hash = hash.wrapping_mul(M);
    }
    let rest = words.remainder();
    if !rest.is_empty() {
        let mut bytes = [0; 8];
        bytes[..rest.len()].copy_from_slice(rest);
        hash ^= u64::from_le_bytes(bytes);
        hash = hash.wrapping_mul(M);
    }
    mix(mix(hash).wrapping_mul(M))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn xxh64_is_that_of_the_reference() {
        // Envoy's `hash_test.cc`.
        assert_eq!(xxh64(b""), 0xEF46_DB37_51D8_E999);
        assert_eq!(xxh64(b"foo"), 3_728_699_739_546_630_719);
        assert_eq!(xxh64(b"bar"), 5_234_164_152_756_840_025);
        assert_eq!(xxh64(b"foo\nbar"), 8_917_841_378_505_826_757);
    }

    #[test]
    fn murmur2_is_that_of_libstdcxx() {
        // What `std::hash<std::string>` of libstdc++ says.
        assert_eq!(murmur2(b"a longer key, past eight"), 1_061_897_331_024_137_820);
        assert_eq!(murmur2(b"foo"), 9_631_199_822_919_835_226);
        assert_eq!(murmur2(b"bar"), 11_474_628_671_133_349_555);
        assert_eq!(murmur2(b"foo\nbar"), 16_306_510_975_912_980_159);
    }
}

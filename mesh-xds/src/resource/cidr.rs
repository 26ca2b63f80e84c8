//! A range of IP addresses.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

/// `envoy.config.core.v3.CidrRange`: all addresses that begin with the same bits.
///
/// An IPv4 address that came over an IPv6 socket (`::ffff:a.b.c.d`) counts as the IPv4 address, in ranges as well.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CidrRange {
    address: IpAddr,
    bits: u8,
}

/// The prefix is longer than the address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a prefix of {bits} bits is longer than the address {address}")]
pub struct PrefixTooLong {
    address: IpAddr,
    bits: u32,
}

impl CidrRange {
    /// The range of the addresses that share the first `bits` with `address`; what follows those bits is cleared.
    ///
    /// # Errors
    /// There are more bits than the address has.
    pub fn new(address: IpAddr, bits: u32) -> Result<Self, PrefixTooLong> {
        let too_long = PrefixTooLong { address, bits };
        let length = if address.is_ipv4() { 32 } else { 128 };
        let bits = u8::try_from(bits).ok().filter(|bits| *bits <= length).ok_or(too_long)?;
        let (address, bits) = match address {
            IpAddr::V6(v6) if bits >= 96 => match v6.to_ipv4_mapped() {
                Some(v4) => (IpAddr::V4(v4), bits - 96),
                None => (address, bits),
            },
            _ => (address, bits),
        };
        Ok(Self { address: masked(address, bits), bits })
    }

    /// The first address.
    pub fn address(self) -> IpAddr {
        self.address
    }

    /// How many leading bits count.
    pub fn bits(self) -> u8 {
        self.bits
    }

    /// Whether the address is one of the range.
    pub fn contains(self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        address.is_ipv4() == self.address.is_ipv4() && masked(address, self.bits) == self.address
    }
}

fn masked(address: IpAddr, bits: u8) -> IpAddr {
    match address {
        IpAddr::V4(v4) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(bits)).unwrap_or(0);
            Ipv4Addr::from_bits(v4.to_bits() & mask).into()
        }
        IpAddr::V6(v6) => {
            let mask = u128::MAX.checked_shl(128 - u32::from(bits)).unwrap_or(0);
            Ipv6Addr::from_bits(v6.to_bits() & mask).into()
        }
    }
}

impl fmt::Display for CidrRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.bits)
    }
}

impl fmt::Debug for CidrRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(text: &str) -> CidrRange {
        let (address, bits) = text.split_once('/').unwrap();
        CidrRange::new(address.parse().unwrap(), bits.parse().unwrap()).unwrap()
    }

    #[test]
    fn addresses_are_compared_by_their_leading_bits() {
        for (of, address, expected) in [
            ("10.1.2.3/8", "10.200.0.1", true),
            ("10.1.2.3/8", "11.0.0.1", false),
            ("10.1.2.3/32", "10.1.2.3", true),
            ("10.1.2.3/32", "10.1.2.4", false),
            ("0.0.0.0/0", "255.1.1.1", true),
            ("0.0.0.0/0", "::1", false),
            ("::/0", "::1", true),
            ("::/0", "1.2.3.4", false),
            ("fd00::1/8", "fdff::", true),
            ("fd00::1/127", "fd00::2", false),
            ("10.0.0.0/8", "::ffff:10.9.9.9", true),
            ("::ffff:10.0.0.0/104", "10.9.9.9", true),
            ("::ffff:10.0.0.0/104", "11.9.9.9", false),
        ] {
            assert_eq!(range(of).contains(address.parse().unwrap()), expected, "{address} in {of}");
        }
    }

    #[test]
    fn equal_ranges_are_equal_and_long_prefixes_are_errors() {
        assert_eq!(range("10.1.2.3/8"), range("10.0.0.0/8"));
        assert_eq!(range("10.1.2.3/8").to_string(), "10.0.0.0/8");
        assert_eq!(range("::ffff:10.1.2.3/104"), range("10.0.0.0/8"));
        assert!(CidrRange::new("10.0.0.1".parse().unwrap(), 33).is_err());
        assert!(CidrRange::new("::1".parse().unwrap(), 129).is_err());
    }
}

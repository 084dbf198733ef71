//! `uuid` and `inet` texts, in the forms that Postgres reads and prints.

use std::fmt::Write;
use std::net::{Ipv4Addr, Ipv6Addr};

/// A UUID in the forms of Postgres' `uuid_in`: 32 hexadecimal digits, a hyphen allowed after each group of
/// four, braces around it allowed.
pub fn parse_uuid(text: &str) -> Option<[u8; 16]> {
    let mut rest = match text.strip_prefix('{') {
        Some(inner) => inner.strip_suffix('}')?.as_bytes(),
        None => text.as_bytes(),
    };
    let mut uuid = [0; 16];
    for (i, byte) in uuid.iter_mut().enumerate() {
        let [high, low, tail @ ..] = rest else {
            return None;
        };
        let digit = |b: &u8| char::from(*b).to_digit(16);
        *byte = (digit(high)? << 4 | digit(low)?) as u8;
        rest = match tail {
            [b'-', tail @ ..] if i % 2 == 1 && i < 15 => tail,
            tail => tail,
        };
    }
    rest.is_empty().then_some(uuid)
}

/// Lower case, with hyphens.
pub fn write_uuid(uuid: &[u8], out: &mut String) {
    for (i, byte) in uuid.iter().enumerate() {
        if matches!(i, 4 | 6 | 8 | 10) {
            out.push('-');
        }
        // Writing into a String cannot fail.
        let _ = write!(out, "{byte:02x}");
    }
}

/// An address with an optional prefix length, in the canonical spelling of Postgres' `inet_out`.
pub fn canonical_inet(text: &str) -> Option<String> {
    let (address, prefix) = match text.split_once('/') {
        Some((address, prefix)) => (address, Some(prefix)),
        None => (text, None),
    };
    let mut out = String::with_capacity(text.len());
    if address.contains(':') {
        let bits = prefix.map_or(Some(128), |p| prefix_length(p, 128, false))?;
        let address: Ipv6Addr = address.parse().ok()?;
        write_v6(address, &mut out);
        if bits != 128 {
            let _ = write!(out, "/{bits}");
        }
    } else {
        let (octets, written) = parse_v4(address)?;
        let bits = match prefix {
            Some(prefix) => prefix_length(prefix, 32, true)?,
            None if written == 4 => 32,
            None => return None,
        };
        // The length may not speak of octets that were left out.
        if usize::from(bits / 8) > written {
            return None;
        }
        let _ = write!(out, "{}", Ipv4Addr::from(octets));
        if bits != 32 {
            let _ = write!(out, "/{bits}");
        }
    }
    Some(out)
}

fn prefix_length(text: &str, max: u8, leading_zeros: bool) -> Option<u8> {
    if text.is_empty()
        || !text.bytes().all(|b| b.is_ascii_digit())
        || !leading_zeros && text.len() > 1 && text.starts_with('0')
    {
        return None;
    }
    text.parse().ok().filter(|&bits| bits <= max)
}

/// One to four octets, a dot after the last one allowed; those left out are zero. Answers how many there were.
fn parse_v4(text: &str) -> Option<([u8; 4], usize)> {
    let mut octets = [0; 4];
    let mut written = 0;
    for part in text.strip_suffix('.').unwrap_or(text).split('.') {
        if part.is_empty() || !part.bytes().all(|b| b.is_ascii_digit()) {
            return None;
        }
        *octets.get_mut(written)? = part.parse().ok()?;
        written += 1;
    }
    Some((octets, written))
}

/// As `inet_net_ntop_ipv6`: the first longest run of two or more zero words is `::`; addresses that embed an
/// IPv4 address (also the deprecated compatible ones, unlike Rust's formatting) end in it.
fn write_v6(address: Ipv6Addr, out: &mut String) {
    let words = address.segments();
    let (mut start, mut len) = (0, 0);
    let mut at = 0;
    while at < 8 {
        let run = words[at..].iter().take_while(|&&w| w == 0).count();
        if run > len {
            (start, len) = (at, run);
        }
        at += run.max(1);
    }
    if len < 2 {
        len = 0;
    }
    let in_run = |i: usize| len > 0 && (start..start + len).contains(&i);
    let embeds_v4 = len > 0 && start == 0 && (len == 6 || len == 5 && words[5] == 0xffff);
    for (i, word) in words.iter().enumerate() {
        if in_run(i) {
            if i == start {
                out.push(':');
            }
            continue;
        }
        if i != 0 {
            out.push(':');
        }
        if i == 6 && embeds_v4 {
            let [a, b] = words[6].to_be_bytes();
            let [c, d] = words[7].to_be_bytes();
            let _ = write!(out, "{a}.{b}.{c}.{d}");
            return;
        }
        let _ = write!(out, "{word:x}");
    }
    if len > 0 && start + len == 8 {
        out.push(':');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuids() {
        let plain = "a0eebc999c0b4ef8bb6d6bb9bd380a11";
        for text in [
            plain,
            "A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11",
            "{a0eebc99-9c0b4ef8-bb6d6bb9-bd380a11}",
            "a0ee-bc99-9c0b-4ef8-bb6d-6bb9-bd38-0a11",
        ] {
            let mut out = String::new();
            write_uuid(&parse_uuid(text).unwrap_or_default(), &mut out);
            assert_eq!(out, "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11", "{text}");
        }
        for text in [
            "",
            "{",
            &plain[1..],
            "{a0eebc999c0b4ef8bb6d6bb9bd380a11",
            " a0eebc999c0b4ef8bb6d6bb9bd380a11",
            "a0-eebc999c0b4ef8bb6d6bb9bd380a11",
            "a0eebc999c0b4ef8bb6d6bb9bd380a11-",
            "g0eebc999c0b4ef8bb6d6bb9bd380a11",
            "é0eebc999c0b4ef8bb6d6bb9bd380a1",
        ] {
            assert_eq!(parse_uuid(text), None, "{text}");
        }
    }

    #[test]
    fn inets_are_spelled_as_postgres_does() {
        for (text, expected) in [
            ("192.168.0.1", Some("192.168.0.1")),
            ("192.168.0.1/32", Some("192.168.0.1")),
            ("192.168.0.1/24", Some("192.168.0.1/24")),
            ("010.0.0.1", Some("10.0.0.1")),
            ("10.1/16", Some("10.1.0.0/16")),
            ("10/8", Some("10.0.0.0/8")),
            ("10/08", Some("10.0.0.0/8")),
            ("2001:DB8::1", Some("2001:db8::1")),
            ("2001:db8:0:0:1:0:0:1", Some("2001:db8::1:0:0:1")),
            ("2001:db8::/32", Some("2001:db8::/32")),
            ("::", Some("::")),
            ("::1/128", Some("::1")),
            ("::2", Some("::2")),
            ("::1.2.3.4", Some("::1.2.3.4")),
            ("::ffff:1.2.3.4", Some("::ffff:1.2.3.4")),
            ("::ffff:0:1", Some("::ffff:0.0.0.1")),
            ("1:0:2:3:4:5:6:7", Some("1:0:2:3:4:5:6:7")),
            ("1::", Some("1::")),
            ("1.2.3./24", Some("1.2.3.0/24")),
            ("1:2:3:4:5:6:0:0", Some("1:2:3:4:5:6::")),
            ("0:1::", Some("0:1::")),
            ("::fffe:1.2.3.4", Some("::fffe:102:304")),
            ("1..2/24", None),
            ("./8", None),
            ("/8", None),
            ("10.1", None),
            ("10.1/24", None),
            ("256.0.0.1", None),
            ("1.2.3.4.5", None),
            ("1.2.3.4/33", None),
            ("1.2.3.4/", None),
            ("::1/129", None),
            ("::1/08", None),
            ("fe80::1%eth0", None),
            (" 1.2.3.4", None),
            ("+1.2.3.4", None),
            ("localhost", None),
            ("", None),
        ] {
            assert_eq!(canonical_inet(text).as_deref(), expected, "{text}");
        }
    }
}

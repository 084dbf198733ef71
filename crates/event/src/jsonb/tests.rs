use super::*;
use crate::testing::Random;

/// Writes jsonb as the server does, beside the text that the server prints of it.
pub(super) enum Value {
    Null,
    Bool(bool),
    /// Plain notation, no zeros in front but the one before the point.
    Number(String),
    Text(String),
    Array(Vec<Value>),
    /// Sorted by length, then bytes, each key once.
    Object(Vec<(String, Value)>),
}

impl Value {
    pub(super) fn random(random: &mut Random, depth: usize) -> Self {
        match random.next() % if depth < 4 { 9 } else { 6 } {
            0 => Self::Null,
            1 => Self::Bool(random.next().is_multiple_of(2)),
            2 | 3 => Self::Number(number(random)),
            4 | 5 => Self::Text(text(random)),
            6 => {
                let count = random.next() % 40;
                Self::Array(
                    (0..count)
                        .map(|_| Self::random(random, depth + 2))
                        .collect(),
                )
            }
            _ => {
                let mut pairs: Vec<(String, Self)> = (0..random.next() % 80)
                    .map(|_| (text(random), Self::random(random, depth + 2)))
                    .collect();
                pairs.sort_by(|(a, _), (b, _)| a.len().cmp(&b.len()).then_with(|| a.cmp(b)));
                pairs.dedup_by(|(a, _), (b, _)| a == b);
                Self::Object(pairs)
            }
        }
    }

    fn print(&self, out: &mut String) {
        match self {
            Self::Null => out.push_str("null"),
            Self::Bool(value) => out.push_str(&value.to_string()),
            Self::Number(text) => out.push_str(text),
            Self::Text(text) => json::write_string(text, out),
            Self::Array(items) => {
                out.push('[');
                for (i, item) in items.iter().enumerate() {
                    out.push_str(if i > 0 { ", " } else { "" });
                    item.print(out);
                }
                out.push(']');
            }
            Self::Object(pairs) => {
                out.push('{');
                for (i, (key, value)) in pairs.iter().enumerate() {
                    out.push_str(if i > 0 { ", " } else { "" });
                    json::write_string(key, out);
                    out.push_str(": ");
                    value.print(out);
                }
                out.push('}');
            }
        }
    }

    pub(super) fn root(&self) -> Vec<u8> {
        match self {
            Self::Array(_) | Self::Object(_) => self.container(),
            scalar => container(ARRAY | SCALAR | 1, &[Part::Value(scalar)]),
        }
    }

    fn container(&self) -> Vec<u8> {
        match self {
            Self::Array(items) => {
                let parts: Vec<Part<'_>> = items.iter().map(Part::Value).collect();
                container(ARRAY | items.len() as u32, &parts)
            }
            Self::Object(pairs) => {
                let keys = pairs.iter().map(|(key, _)| Part::Key(key));
                let values = pairs.iter().map(|(_, value)| Part::Value(value));
                container(
                    OBJECT | pairs.len() as u32,
                    &keys.chain(values).collect::<Vec<_>>(),
                )
            }
            _ => Vec::new(),
        }
    }
}

enum Part<'a> {
    Key(&'a str),
    Value(&'a Value),
}

fn container(header: u32, parts: &[Part<'_>]) -> Vec<u8> {
    let mut entries = header.to_ne_bytes().to_vec();
    let mut data = Vec::new();
    for (at, part) in parts.iter().enumerate() {
        let start = data.len();
        let align = |data: &mut Vec<u8>| data.resize(data.len().next_multiple_of(4), 0);
        let kind = match part {
            Part::Key(text) => {
                data.extend_from_slice(text.as_bytes());
                STRING
            }
            Part::Value(value) => match value {
                Value::Null => NULL,
                Value::Bool(true) => TRUE,
                Value::Bool(false) => FALSE,
                Value::Text(text) => {
                    data.extend_from_slice(text.as_bytes());
                    STRING
                }
                Value::Number(text) => {
                    align(&mut data);
                    data.extend_from_slice(&numeric(text));
                    NUMERIC
                }
                Value::Array(_) | Value::Object(_) => {
                    align(&mut data);
                    data.extend_from_slice(&value.container());
                    CONTAINER
                }
            },
        };
        let entry = match at % 32 {
            0 => kind | HAS_OFFSET | data.len() as u32,
            _ => kind | (data.len() - start) as u32,
        };
        entries.extend_from_slice(&entry.to_ne_bytes());
    }
    entries.extend_from_slice(&data);
    entries
}

/// As `make_result` of `numeric.c`: digits of base 10,000 without outer zeros, short form where it fits.
fn numeric(text: &str) -> Vec<u8> {
    let (negative, text) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let padded = format!(
        "{}{whole}{fraction}{}",
        "0".repeat(whole.len().next_multiple_of(4) - whole.len()),
        "0".repeat(fraction.len().next_multiple_of(4) - fraction.len()),
    );
    let mut digits: Vec<u16> = padded
        .as_bytes()
        .chunks(4)
        .map(|group| group.iter().fold(0, |n, b| n * 10 + u16::from(b - b'0')))
        .collect();
    let mut weight = whole.len().div_ceil(4) as i16 - 1;
    while digits.first() == Some(&0) {
        digits.remove(0);
        weight -= 1;
    }
    while digits.last() == Some(&0) {
        digits.pop();
    }
    if digits.is_empty() {
        weight = 0;
    }
    let scale = fraction.len() as u16;
    let mut halves = Vec::new();
    if scale <= 0x3F && (-64..=63).contains(&weight) {
        let sign = if negative { 0x2000 } else { 0 };
        let below_zero = if weight < 0 { 0x40 } else { 0 };
        halves.push(SHORT | sign | scale << 7 | below_zero | (weight as u16 & 0x3F));
    } else {
        halves.push(if negative { 0x4000 } else { 0 } | scale);
        halves.push(weight as u16);
    }
    halves.extend(digits);
    let length = VARLENA_HEADER + halves.len() * 2;
    let mut bytes = ((length as u32) << 2).to_ne_bytes().to_vec();
    bytes.extend(halves.iter().flat_map(|half| half.to_ne_bytes()));
    bytes
}

pub(super) fn number(random: &mut Random) -> String {
    let mut digits = |most: u64| -> String {
        let count = match random.next() % 4 {
            0 => random.next() % most,
            _ => random.next() % 6,
        };
        (0..count)
            .map(|_| char::from(b"0001234567899"[(random.next() % 13) as usize]))
            .collect()
    };
    let whole = digits(300).trim_start_matches('0').to_owned();
    let fraction = digits(90);
    let zero = whole.is_empty() && fraction.bytes().all(|b| b == b'0');
    let sign = if zero || random.next().is_multiple_of(2) {
        ""
    } else {
        "-"
    };
    let whole = if whole.is_empty() { "0" } else { &whole };
    match fraction.as_str() {
        "" => format!("{sign}{whole}"),
        fraction => format!("{sign}{whole}.{fraction}"),
    }
}

pub(super) fn text(random: &mut Random) -> String {
    let pieces = [
        "a",
        "key",
        "é",
        "\"",
        "\\",
        "\n",
        "\u{1}",
        "long enough for a word",
        "😀",
        "z9",
    ];
    (0..random.next() % 4)
        .map(|_| random.pick(&pieces))
        .collect()
}

#[test]
fn any_value_is_printed_as_the_server_does() {
    for seed in 0..1_000 {
        let value = Value::random(&mut Random(seed), 0);
        let mut expected = String::new();
        value.print(&mut expected);
        assert_eq!(
            to_text(&value.root()).as_ref(),
            Some(&expected),
            "seed {seed}"
        );
    }
}

#[test]
fn numbers_keep_their_scale() {
    for text in [
        "0",
        "0.0",
        "0.000000",
        "1",
        "-1",
        "1.0",
        "10000",
        "9999.9999",
        "123456789.00001",
        "0.00000001",
        "-0.5",
        "100000000000000000000000000000",
        "12340000.5",
    ] {
        assert_eq!(
            to_text(&Value::Number(text.to_owned()).root()).as_deref(),
            Some(text)
        );
    }
}

#[test]
fn what_is_no_jsonb_is_refused() {
    let value = Value::random(&mut Random(7), 0);
    for seed in 0..50_000 {
        let mut random = Random(seed);
        let mut bytes = match seed % 50 {
            0 => Value::random(&mut random, 1).root(),
            _ => value.root(),
        };
        for _ in 0..=random.next() % 4 {
            let at = (random.next() % (bytes.len() as u64 + 1)) as usize;
            match random.next() % 4 {
                0 => bytes.truncate(at),
                _ if at < bytes.len() => bytes[at] = random.next() as u8,
                _ => {}
            }
        }
        // Anything but a panic or an endless text.
        let shown = to_text(&bytes).unwrap_or_default();
        assert!(shown.len() < 1 << 24, "seed {seed}");
    }
    assert_eq!(to_text(&[]), None);
    assert_eq!(to_text(&[0; 8]), None);
}

#[test]
fn few_bytes_do_not_become_any_length_of_text() {
    // A digit of base 10,000 at the largest weight, with no digits behind it.
    let large: Vec<u8> = [0_u16, 0x7FFF, 1]
        .iter()
        .flat_map(|half| half.to_ne_bytes())
        .collect();
    let count = 100;
    let mut bytes = (ARRAY | count).to_ne_bytes().to_vec();
    for _ in 0..count {
        bytes.extend((NUMERIC | 12).to_ne_bytes());
    }
    for _ in 0..count {
        bytes.extend((10_u32 << 2).to_ne_bytes());
        bytes.extend(&large);
        bytes.extend([0; 2]);
    }
    let digits = 4 * 0x7FFF + 1;
    assert_eq!(to_text_within(&bytes, 1 << 20), None);
    let whole = to_text(&bytes).unwrap_or_default();
    assert_eq!(whole.len(), count as usize * (digits + 2));
}

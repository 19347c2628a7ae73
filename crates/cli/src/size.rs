//! Sizes and times as typed: `512M`, `1G`, `60s`.

use std::time::Duration;

/// Units of 1,024, smallest first.
const UNITS: &str = "KMGTPE";
const UNITS_OF_TIME: &str = "a time is a number and ms, s, m, h, d or w";

/// Reads a size with its unit: `512M`, `1G`, `1GiB`.
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    if number.is_empty() {
        return Err("a size is a number and a unit, such as 512M or 1G".to_owned());
    }
    let unit = unit.to_ascii_uppercase();
    let unit = unit.strip_suffix("IB").or_else(|| unit.strip_suffix('B')).unwrap_or(&unit);
    let mut letters = unit.chars();
    let power = match (letters.next(), letters.next()) {
        (None, _) if number.bytes().all(|digit| digit == b'0') => Some(0),
        (None, _) => return Err(format!("{number} has no unit: write {number}M or {number}G")),
        (Some(letter), None) => UNITS.find(letter),
        _ => None,
    };
    let Some(power) = power else { return Err("the units are K, M, G, T, P and E".to_owned()) };
    let factor = 1u64 << (10 * (power + 1));
    let bytes = number.parse::<u64>().ok().and_then(|number| number.checked_mul(factor));
    match bytes {
        Some(0) => Err("it must be more than nothing".to_owned()),
        Some(bytes) if i64::try_from(bytes).is_ok() => Ok(bytes),
        _ => Err("it is more than 8 EiB".to_owned()),
    }
}

/// True if the text looks like a size rather than the name of a file.
pub(crate) fn looks_like_size(text: &str) -> bool {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let unit = text.get(digits..).unwrap_or_default().to_ascii_uppercase();
    let unit = unit.strip_suffix("IB").or_else(|| unit.strip_suffix('B')).unwrap_or(&unit);
    digits > 0 && (unit.is_empty() || unit.len() == 1 && UNITS.contains(unit))
}

/// Reads a time: `500ms`, `60s`, `5m`, `1h`, `7d`, `4w`; a bare number is seconds.
pub(crate) fn parse_duration(text: &str) -> Result<Duration, String> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let milliseconds = match unit {
        "ms" => 1,
        "" | "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        "w" => 604_800_000,
        _ => return Err(UNITS_OF_TIME.to_owned()),
    };
    let number: u64 = number.parse().map_err(|_| UNITS_OF_TIME.to_owned())?;
    number.checked_mul(milliseconds).map(Duration::from_millis).ok_or_else(|| "it is too long".to_owned())
}

/// Reads the time that a snapshot stays, in seconds: `30s`, `10m`, `2h`, `7d`, `4w`. A bare number could mean any of these.
pub(crate) fn parse_expiry(text: &str) -> Result<u64, String> {
    let time = parse_duration(text)?;
    if text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(format!("{text} has no unit: write {text}d or {text}h"));
    }
    if time.as_secs() == 0 { Err("it must be a second at least".to_owned()) } else { Ok(time.as_secs()) }
}

/// The same, or 0 for `never`.
pub(crate) fn parse_expiry_or_never(text: &str) -> Result<u64, String> {
    if text == "never" { Ok(0) } else { parse_expiry(text).map_err(|error| format!("{error}, or never")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in
            [("1K", 1 << 10), ("512M", 512 << 20), ("1g", 1 << 30), ("2GiB", 2 << 30), ("3TB", 3 << 40)]
        {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn bad_sizes_say_what_is_wrong() {
        for (text, words) in [
            ("0", "more than nothing"),
            ("0G", "more than nothing"),
            ("512", "write 512M"),
            ("16E", "8 EiB"),
            ("8E", "8 EiB"),
            ("99999999999999999999G", "8 EiB"),
            ("1X", "units"),
            ("G", "a number and a unit"),
            ("-1G", "a number and a unit"),
            ("1.5G", "units"),
            ("", "a number and a unit"),
        ] {
            let error = parse_size(text).unwrap_err();
            assert!(error.contains(words), "{text}: {error}");
        }
    }

    #[test]
    fn files_are_not_sizes() {
        assert!(looks_like_size("10G") && looks_like_size("0") && looks_like_size("16E"));
        for file in ["disk.img", "./10G", "10Gx", "", "debian-12"] {
            assert!(!looks_like_size(file), "{file}");
        }
    }

    #[test]
    fn durations() {
        assert_eq!(parse_duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(parse_duration("60"), Ok(Duration::from_secs(60)));
        assert_eq!(parse_duration("5m"), Ok(Duration::from_secs(300)));
        assert_eq!(parse_duration("4w"), Ok(Duration::from_secs(28 * 86_400)));
        assert!(parse_duration("5 m").is_err() && parse_duration("s").is_err());
        assert!(parse_duration("18446744073709551615h").is_err());
    }

    #[test]
    fn expiries() {
        for (text, seconds) in [("30s", 30), ("10m", 600), ("2h", 7200), ("7d", 604_800), ("1500ms", 1)] {
            assert_eq!(parse_expiry(text), Ok(seconds), "{text}");
        }
        assert_eq!(parse_expiry_or_never("never"), Ok(0));
        for (text, words) in [
            ("7", "write 7d"),
            ("0d", "a second"),
            ("20ms", "a second"),
            ("never", "a number and"),
            ("", "a number and"),
        ] {
            let error = parse_expiry(text).unwrap_err();
            assert!(error.contains(words), "{text}: {error}");
        }
    }
}

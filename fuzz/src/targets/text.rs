//! Whatever else users give as text: storage URLs, options of copies, patterns of files, names, types, times, numbers,
//! addresses, user agents and referrers. What is printed reads back as the same.
use std::path::PathBuf;
use std::sync::LazyLock;
use std::{env, fs, process};

use crate::{seed, split};
use rakam_event::coerce::coerce;
use rakam_event::infer::infer;
use rakam_event::json::{self, Cutter};
use rakam_event::names::{self, CollectionName, ProjectName};
use rakam_event::number::Number;
use rakam_event::types::FieldType;
use rakam_event::{net, testing, time};
use rakam_files::format::{Compression, Format, Options};
use rakam_files::locate::{self, Location};
use rakam_lake::chunk::ChunkFormat;
use rakam_lake::period;
use rakam_lake::storage::{Credentials, StorageOptions, StorageUrl};
use rakam_mappers::geoip::Places;
use rakam_mappers::session::Visit;
use rakam_mappers::{referrer, user_agent};

/// A folder of a few files in a few folders, for patterns to match.
static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| {
    let folder = env::temp_dir().join(format!("rakam-fuzz-folder-{}", process::id()));
    for name in [
        "a.csv",
        "b.csv",
        "[1].csv",
        ".hidden",
        "x/y/z/a.csv",
        "x/a.json",
        "x/y/b",
    ] {
        let path = folder.join("root").join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, name).unwrap();
    }
    fs::write(folder.join("secret.csv"), "secret").unwrap();
    fs::canonicalize(folder.join("root")).unwrap()
});

pub fn run(input: &[u8]) {
    if let Some(([kind], rest)) = split(input) {
        let text = String::from_utf8_lossy(rest);
        match kind % 8 {
            0 => urls(&text),
            1 => options(&text),
            2 => patterns(&text),
            3 => names_and_types(&text),
            4 => values(&text),
            5 => numbers_and_times(&text),
            6 => mappers(&text),
            _ => places(rest),
        };
    }
}

/// The first line is an address, the others are options of a server and of a user mapping: `name=value`.
fn urls(text: &str) {
    let mut lines = text.lines();
    let Ok(url) = StorageUrl::parse(lines.next().unwrap_or_default()) else {
        return;
    };
    // An account is not part of what is shown.
    let shown = url.to_string();
    assert_eq!(StorageUrl::parse(&shown).unwrap().to_string(), shown);
    let options: Vec<(&str, &str)> = lines.filter_map(|line| line.split_once('=')).collect();
    let _ = StorageOptions::parse(&url, &options);
    let _ = Credentials::parse(&options);
}

fn options(text: &str) {
    for name in [text, "a.tsv.gz"] {
        let _ = Format::of_name(name);
        Compression::of_name(name);
        if let Ok(options) = Options::parse(text) {
            let _ = options.csv(name);
        }
    }
    if let Ok(format) = Format::parse(text) {
        assert_eq!(Format::parse(format.name()), Ok(format));
    }
    ChunkFormat::parse(text);
}

fn patterns(text: &str) {
    for found in locate::find(&FOLDER, text, true).into_iter().flatten() {
        let Location::File(path) = found.at else {
            panic!("a directory has no objects");
        };
        assert!(path.starts_with(&*FOLDER), "{}", path.display());
    }
}

fn names_and_types(text: &str) {
    if let Ok(name) = ProjectName::parse(text) {
        assert_eq!(ProjectName::parse(name.as_str()).unwrap(), name);
    }
    if let Ok(name) = CollectionName::parse(text) {
        assert_eq!(CollectionName::parse(name.as_str()).unwrap(), name);
    }
    let name = names::field_name(text);
    // Capitals outside of ASCII stay: behind one that became small they look like the beginning of a word.
    if !name.chars().any(char::is_uppercase) {
        assert_eq!(names::field_name(&name), name);
    }
    if let Some(field) = names::server_field(text) {
        assert_eq!(name, field);
    }
    names::can_be_column(&name);
    assert!(period::component(text).len() < 256);
    if let Some(ty) = FieldType::parse(text) {
        assert_eq!(FieldType::parse(&ty.to_string()), Some(ty));
        ty.arrow();
    }
}

/// A JSON value as a value of each type, and that one once more.
fn values(text: &str) {
    let raw = json::trim(text);
    let event = format!("{{\"a\":{raw}}}");
    if !rakam_event::roads::event(&event) {
        return;
    }
    infer(raw);
    for ty in testing::every_type(&[(9, 3), (38, 0)]) {
        let Ok(value) = coerce(raw, ty, &mut Cutter::off()) else {
            continue;
        };
        let mut printed = String::new();
        value.write_json(ty, &mut printed);
        let again = coerce(&printed, ty, &mut Cutter::off());
        let again = again.unwrap_or_else(|e| panic!("{raw} as {ty} is {printed}: {e}"));
        let mut twice = String::new();
        again.write_json(ty, &mut twice);
        assert_eq!(twice, printed, "{raw} as {ty}");
    }
}

fn numbers_and_times(text: &str) {
    if let Some(number) = Number::parse(text) {
        let mut printed = String::new();
        number.write(&mut printed);
        let again = Number::parse(&printed).unwrap_or_else(|| panic!("{text} is {printed}"));
        let mut twice = String::new();
        again.write(&mut twice);
        assert_eq!(twice, printed);
        assert_eq!(again.to_i64(), number.to_i64());
        for scale in [0, 3, 38] {
            assert_eq!(again.scaled(scale), number.scaled(scale), "{text}");
        }
        assert_eq!(again.to_f64(), number.to_f64(), "{text}");
        number.to_f32();
        number.fits_numeric();
    }
    let times = [
        time::exact_timestamp(text),
        time::timestamp(text),
        time::event_time(text),
    ];
    for micros in times.into_iter().flatten() {
        assert!((time::MIN_TIME_US..=time::MAX_TIME_US).contains(&micros));
        let mut printed = String::new();
        time::write_timestamp(micros, &mut printed);
        assert_eq!(time::exact_timestamp(&printed), Some(micros), "{text}");
    }
    if let Some(days) = time::exact_date(text) {
        let mut printed = String::new();
        time::write_date(i64::from(days), &mut printed);
        assert_eq!(printed, text);
    }
    if let Some(uuid) = net::parse_uuid(text) {
        let mut printed = String::new();
        net::write_uuid(&uuid, &mut printed);
        assert_eq!(net::parse_uuid(&printed), Some(uuid));
    }
    if let Some(inet) = net::canonical_inet(text) {
        assert_eq!(net::canonical_inet(&inet).as_ref(), Some(&inet));
    }
}

/// The text as each of the fields that the mappers read, and as the event itself.
fn mappers(text: &str) {
    let mut value = String::new();
    json::write_string(text, &mut value);
    let keys = [
        "_referrer",
        "_user_agent",
        "_user",
        "_device_id",
        "_time",
        "_host",
    ];
    let event = keys.map(|key| format!("\"{key}\":{value}")).join(",");
    for event in [text, &format!("{{{event}}}")] {
        for mapped in [referrer::map(event), user_agent::map(event)]
            .into_iter()
            .flatten()
        {
            json::object_entries(&mapped, |_, _| ()).unwrap();
        }
        let _ = Visit::of(event, i64::MAX, i64::MAX);
    }
}

/// A database of places is a file that an administrator has downloaded.
fn places(bytes: &[u8]) {
    if let Ok(places) = Places::new(bytes) {
        for ip in ["1.2.3.4", "2001:db8::1", "::ffff:10.0.0.1"] {
            let event = format!("{{\"_ip\":\"{ip}\"}}");
            json::object_entries(&places.map(&event).unwrap(), |_, _| ()).unwrap();
        }
    }
}

pub fn seeds() -> Vec<Vec<u8>> {
    let texts: [(u8, &[&str]); 7] = [
        (
            0,
            &[
                "file:///var/lake",
                "FILE:///a//b/./c/",
                "s3://bucket/lake/\nregion=eu-west-1\nendpoint=http://127.0.0.1:9000\naccess_key_id=a\nsecret_access_key=b",
                "abfss://container@account.dfs.core.windows.net/a",
                "hdfs://name/lake",
            ],
        ),
        (
            1,
            &[
                r#"{"header": false, "delimiter": ";", "null": "NA", "quote": "'", "escape": null}"#,
                "dir.x/A.CSV.GZ",
                "parquet",
            ],
        ),
        (
            2,
            &[
                "*.csv",
                "**/a.csv",
                "x/*/?/[a-z].csv",
                "[!1]*",
                "**/**/y/**",
                "../secret.csv",
            ],
        ),
        (
            3,
            &[
                "PageView",
                "userName",
                " \" Total Price \" ",
                "$serverTime",
                "numeric(9, 2)",
            ],
        ),
        (
            4,
            &[
                "[true,null,\"false\"]",
                "1.5e3",
                "\"10/8\"",
                "\"2020-01-02 03:04:05.5+02\"",
                "[1,\"a\"]",
            ],
        ),
        (
            5,
            &[
                "-12.50e-3",
                "1e131071",
                "2020-01-02T03:04:59.9999999-05:30",
                "1577934245123.4567",
                "{a0eebc99-9c0b4ef8-bb6d6bb9-bd380a11}",
                "::ffff:1.2.3.4/96",
                "10.1/16",
            ],
        ),
        (
            6,
            &[
                "https://www.google.com/search?q=a%20b+c&utm_source=x",
                "Mozilla/5.0 (iPhone; CPU iPhone OS 17_0 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) Version/17.0 Mobile/15E148 Safari/604.1",
                "Mozilla/5.0 (compatible; Googlebot/2.1; +http://www.google.com/bot.html)",
            ],
        ),
    ];
    let mut seeds = Vec::new();
    for (kind, texts) in texts {
        seeds.extend(texts.iter().map(|text| seed(&[kind], text.as_bytes())));
    }
    let metadata = b"\0\0\x10\0\0\x10\0\0\x10\0\0\x10\xab\xcd\xefMaxMind.com\xe4Jnode_count\xc1\x02Krecord_size\xa1\x18Jip_version\xa1\x06Mdatabase_typeBGE";
    seeds.push(seed(&[7], metadata));
    seeds
}

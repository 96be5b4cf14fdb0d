//! `vhdfs map`: the whole file as a picture, each character a part of it, or as a list of its parts.

use std::io::{self, Write};

use serde::Serialize;
use vhdfs::disk::{BeyondEnd, Disk, DiskType, OpenOptions, Region, RegionKind};

use super::{about, name};
use crate::cli::MapArguments;
use crate::text::{Bytes, output, output_with, say, shown};
use crate::{Failure, Outcome};

/// The most lines that the picture takes.
const MAX_ROWS: u64 = 16;

/// The most lines that what lies beyond the end of a file takes.
const MAX_ROWS_BEYOND: u64 = 2;

/// Less of the file than this is not worth a character.
const MIN_CELL: u64 = 4096;

/// The kinds, in the order in which the legend lists them.
const KINDS: [RegionKind; 5] = [
    RegionKind::Metadata,
    RegionKind::Live,
    RegionKind::Unknown,
    RegionKind::Dead,
    RegionKind::Hole,
];

/// Runs the command.
pub(crate) fn run(arguments: &MapArguments) -> Result<Outcome, Failure> {
    let file = &arguments.file;
    let options = OpenOptions {
        read_only: true,
        lock: false,
        ..OpenOptions::default()
    };
    let disk = Disk::open_with(file, &options, &arguments.parents.of(file))?;
    let info = disk.info().map_err(|error| about(file, &error))?;
    if !arguments.no_scan
        && info.disk_type != DiskType::Fixed
        && let Err(error) = disk.scan()
    {
        // The picture is all the same worth something; `check` says what is wrong.
        say(&format!(
            "not all blocks looked at: {}",
            about(file, &error)
        ));
    }
    let (regions, beyond) = (disk.regions(), disk.beyond_end());
    if arguments.json {
        output_with(|out| write_json(out, &name(file), info.file_length, &regions, beyond))?;
    } else {
        let marks = if !arguments.ascii && speaks_unicode() {
            UNICODE
        } else {
            ASCII
        };
        let picture = draw(&regions, beyond, columns(), marks);
        let title = format!("{}: {}\n", shown(file), Bytes(info.file_length));
        output((title + &picture).as_bytes())?;
    }
    Ok(Outcome::Fine)
}

#[derive(Serialize)]
struct JsonRegion {
    start: u64,
    len: u64,
    kind: &'static str,
}

/// Writes the regions one by one, each in a line: a large disk may have millions.
fn write_json(
    out: &mut dyn Write,
    file: &str,
    file_length: u64,
    regions: &[Region],
    beyond: BeyondEnd,
) -> io::Result<()> {
    writeln!(out, "{{")?;
    writeln!(out, "  \"file\": {},", serde_json::to_string(file)?)?;
    writeln!(out, "  \"file_length\": {file_length},")?;
    writeln!(out, "  \"blocks_beyond_end\": {},", beyond.blocks)?;
    writeln!(out, "  \"bytes_beyond_end\": {},", beyond.bytes)?;
    write!(out, "  \"regions\": [")?;
    for (index, region) in regions.iter().enumerate() {
        write!(out, "{}\n    ", if index == 0 { "" } else { "," })?;
        let region = JsonRegion {
            start: region.range.start.get(),
            len: region.range.len,
            kind: match region.kind {
                RegionKind::Metadata => "metadata",
                RegionKind::Live => "live",
                RegionKind::Unknown => "unknown",
                RegionKind::Dead => "dead",
                RegionKind::Hole => "hole",
            },
        };
        serde_json::to_writer(&mut *out, &region)?;
    }
    writeln!(out, "\n  ]\n}}")
}

type Marks = fn(RegionKind) -> (char, &'static str);

const ASCII: Marks = |kind| match kind {
    RegionKind::Metadata => ('M', "metadata"),
    RegionKind::Live => ('#', "live"),
    RegionKind::Unknown => ('?', "not yet looked at"),
    RegionKind::Dead => ('x', "dead"),
    RegionKind::Hole => ('.', "hole"),
};

const UNICODE: Marks = |kind| {
    let mark = match kind {
        // Full, medium and light shade, and a middle dot.
        RegionKind::Live => '\u{2588}',
        RegionKind::Unknown => '\u{2592}',
        RegionKind::Dead => '\u{2591}',
        RegionKind::Hole => '\u{b7}',
        RegionKind::Metadata => 'M',
    };
    (mark, ASCII(kind).1)
};

/// What lies beyond the end of the file, in each alphabet.
const BEYOND: (char, &str) = ('!', "beyond the end");

fn draw(regions: &[Region], beyond: BeyondEnd, columns: u64, marks: Marks) -> String {
    let end = regions.last().map_or(0, |region| region.range.end().get());
    let cells = (end.div_ceil(MIN_CELL)).clamp(1, columns * MAX_ROWS);
    let cell_size = end.div_ceil(cells).max(1);
    let mut picture = String::new();
    let mut first = 0;
    for cell in 0..end.div_ceil(cell_size) {
        let start = cell * cell_size;
        let cell_end = end.min(start.saturating_add(cell_size));
        while regions
            .get(first)
            .is_some_and(|region| region.range.end().get() <= start)
        {
            first += 1;
        }
        picture.push(marks(dominant(&regions[first..], start, cell_end)).0);
        if (cell + 1).is_multiple_of(columns) {
            picture.push('\n');
        }
    }
    if !picture.ends_with('\n') {
        picture.push('\n');
    }
    if beyond.bytes > 0 {
        picture.push_str("the file was cut; beyond its end, and not readable:\n");
        picture.push_str(&draw_beyond(beyond.bytes, cell_size, columns));
    }
    picture.push_str(&legend(regions, beyond, cell_size, marks));
    picture
}

/// What is not there has no places that tell anything, so that its amount is all that is drawn, in the
/// scale of the file.
fn draw_beyond(bytes: u64, cell_size: u64, columns: u64) -> String {
    let cells = bytes.div_ceil(cell_size);
    let drawn = cells.min(columns * MAX_ROWS_BEYOND);
    let mut picture = String::new();
    for cell in 1..=drawn {
        picture.push(BEYOND.0);
        if cell.is_multiple_of(columns) || cell == drawn {
            picture.push('\n');
        }
    }
    if drawn < cells {
        picture.push_str("...\n");
    }
    picture
}

/// The kind that has most of `start..end`.
fn dominant(regions: &[Region], start: u64, end: u64) -> RegionKind {
    let mut shares = [0; KINDS.len()];
    for region in regions
        .iter()
        .take_while(|region| region.range.start.get() < end)
    {
        let from = region.range.start.get().max(start);
        let to = region.range.end().get().min(end);
        shares[place(region.kind)] += to.saturating_sub(from);
    }
    // Of equals the first, and so metadata, which is small and easily lost.
    let most = shares.iter().max().copied().unwrap_or_default();
    KINDS[shares
        .iter()
        .position(|share| *share == most)
        .unwrap_or_default()]
}

fn place(kind: RegionKind) -> usize {
    KINDS
        .iter()
        .position(|known| *known == kind)
        .unwrap_or_default()
}

fn legend(regions: &[Region], beyond: BeyondEnd, cell_size: u64, marks: Marks) -> String {
    let mut text = format!("one character: {}\n", Bytes(cell_size));
    for kind in KINDS {
        let of_kind = || regions.iter().filter(|region| region.kind == kind);
        let bytes: u64 = of_kind().map(|region| region.range.len).sum();
        if bytes > 0 {
            let (mark, meaning) = marks(kind);
            let (bytes, count) = (Bytes(bytes), of_kind().count());
            text.push_str(&format!(
                "  {mark} {meaning:<18} {bytes:>11} in {count} runs\n"
            ));
        }
    }
    if beyond.bytes > 0 {
        let (mark, meaning) = BEYOND;
        let bytes = Bytes(beyond.bytes);
        let of = match beyond.blocks {
            0 => String::new(),
            1 => " of 1 block".to_owned(),
            blocks => format!(" of {blocks} blocks"),
        };
        text.push_str(&format!("  {mark} {meaning:<18} {bytes:>11}{of}\n"));
    }
    text
}

fn columns() -> u64 {
    const WITHOUT_A_TERMINAL: u64 = 64;
    #[cfg(unix)]
    if let Ok(size) = rustix::termios::tcgetwinsize(io::stdout())
        && size.ws_col >= 16
    {
        return size.ws_col.into();
    }
    WITHOUT_A_TERMINAL
}

fn speaks_unicode() -> bool {
    // The first that is set decides, as for setlocale.
    let locale = ["LC_ALL", "LC_CTYPE", "LANG"]
        .iter()
        .find_map(|name| std::env::var(name).ok().filter(|value| !value.is_empty()));
    locale.is_some_and(|locale| {
        let locale = locale.to_ascii_lowercase();
        locale.contains("utf-8") || locale.contains("utf8")
    })
}

#[cfg(test)]
mod tests {
    use vhdfs::units::{FileOffset, FileRange};

    use super::*;

    const WHOLE: BeyondEnd = BeyondEnd {
        blocks: 0,
        bytes: 0,
    };

    fn region(start: u64, len: u64, kind: RegionKind) -> Region {
        Region {
            range: FileRange::new(FileOffset::new(start), len),
            kind,
        }
    }

    #[test]
    fn every_part_of_the_file_has_its_place() {
        let regions = [
            region(0, 4096, RegionKind::Metadata),
            region(4096, 8192, RegionKind::Live),
            region(12288, 4096, RegionKind::Dead),
            region(16384, 4096, RegionKind::Hole),
            region(20480, 512, RegionKind::Metadata),
        ];
        let picture = draw(&regions, WHOLE, 4, ASCII);
        let lines: Vec<_> = picture.lines().collect();
        // 20992 bytes in 6 cells of 3499 bytes: a cell shows what most of it is.
        assert_eq!(&lines[..2], ["M###", "x."]);
        assert!(picture.contains("4.5 KiB in 2 runs"), "{picture}");
        assert!(draw(&regions, WHOLE, 4, UNICODE).contains('\u{2588}'));
    }

    #[test]
    fn large_files_are_scaled_to_the_screen() {
        let regions = [region(0, 1 << 40, RegionKind::Live)];
        let picture = draw(&regions, WHOLE, 80, ASCII);
        assert_eq!(
            picture.chars().filter(|mark| *mark == '#').count(),
            80 * 16 + 1
        );
        assert!(!draw(&[], WHOLE, 80, ASCII).contains('#'));
    }

    #[test]
    fn what_a_file_lacks_is_drawn_in_its_scale() {
        let regions = [region(0, 1 << 20, RegionKind::Live)];
        let cut = |bytes| BeyondEnd { blocks: 2, bytes };
        // 64 cells of 16 KiB.
        let picture = draw(&regions, cut(48 << 10), 4, ASCII);
        assert!(
            picture.contains("readable:\n!!!\none character"),
            "{picture}"
        );
        assert!(
            picture.contains("! beyond the end        48.0 KiB of 2 blocks\n"),
            "{picture}"
        );
        // However much it is.
        let picture = draw(&regions, cut(1 << 45), 4, ASCII);
        assert!(picture.contains("!!!!\n!!!!\n...\n"), "{picture}");
        assert!(!draw(&regions, WHOLE, 4, ASCII).contains('!'));
    }

    #[test]
    fn json_is_json() {
        for regions in [
            &[][..],
            &[
                region(0, 512, RegionKind::Hole),
                region(512, 7, RegionKind::Live),
            ],
        ] {
            let mut text = Vec::new();
            write_json(&mut text, "a\"b", 519, regions, WHOLE).unwrap();
            let value: serde_json::Value = serde_json::from_slice(&text).unwrap();
            assert_eq!(value["file"], "a\"b");
            let found = value["regions"].as_array().unwrap();
            assert_eq!(found.len(), regions.len());
            if let Some(last) = found.last() {
                assert_eq!(
                    last,
                    &serde_json::json!({"start": 512, "len": 7, "kind": "live"})
                );
            }
        }
    }
}

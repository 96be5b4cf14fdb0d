use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use vhdfs::guest::*;
struct D(File, u64, u64);
impl Source for D {
    fn len(&self) -> u64 {
        self.1
    }
    fn sector_size(&self) -> u64 {
        self.2
    }
    fn read_at(&self, b: &mut [u8], o: u64) -> io::Result<()> {
        self.0.read_exact_at(b, o)
    }
}
fn main() {
    let a: Vec<String> = std::env::args().collect();
    let f = File::options()
        .read(true)
        .write(a.len() > 2)
        .open(&a[1])
        .unwrap();
    let l = f.metadata().unwrap().len();
    let d = D(f, l, 512);
    let t = std::time::Instant::now();
    let s = survey(&d, &SurveyOptions::default()).unwrap();
    println!(
        "{:?} runs {} evidence {} in {:?}",
        s.parts,
        s.free.iter().count(),
        s.evidence.bytes(),
        t.elapsed()
    );
    println!("holds {}", s.evidence.still_holds(&d).unwrap());
    if a.len() > 2 {
        let junk = vec![0xa5u8; 1 << 20];
        for r in s.free.iter() {
            let mut p = r.start;
            while p < r.end {
                let n = (r.end - p).min(1 << 20);
                d.0.write_all_at(&junk[..n as usize], p).unwrap();
                p += n;
            }
        }
        println!("spoiled");
    }
}

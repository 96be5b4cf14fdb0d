use crate::rig::RawDisk;
use vhdfs::guest::{SurveyOptions, survey};
#[test]
fn look() {
    for path in std::env::var("LOOK").unwrap().split(':') {
        let t = std::time::Instant::now();
        let s = survey(
            &RawDisk::open(std::path::Path::new(path), 512),
            &SurveyOptions::default(),
        )
        .unwrap();
        println!(
            "{path}: {:?} {:?} runs {} evidence {} {:?}",
            s.parts[0].content,
            s.parts[0].outcome,
            s.free.len(),
            s.evidence.bytes(),
            t.elapsed()
        );
    }
}

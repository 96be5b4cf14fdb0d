//! What `GetVirtualDiskInformation` answers, as bytes.

use uuid::Uuid;

use crate::virtdisk::info::VirtualDiskInfo;

/// What follows the version in a `GET_VIRTUAL_DISK_INFO`.
pub(super) fn encoded(info: &VirtualDiskInfo) -> Vec<u8> {
    let truth = |value: bool| i32::from(value).to_ne_bytes().to_vec();
    match info {
        VirtualDiskInfo::Size {
            virtual_size,
            physical_size,
            block_size,
            sector_size,
        } => [
            &virtual_size.to_ne_bytes()[..],
            &physical_size.to_ne_bytes(),
            &block_size.to_ne_bytes(),
            &sector_size.to_ne_bytes(),
        ]
        .concat(),
        VirtualDiskInfo::Identifier(id) | VirtualDiskInfo::ParentIdentifier(id) => guid_bytes(*id),
        VirtualDiskInfo::ParentLocation {
            resolved,
            locations,
        } => {
            // One string, or a list of them that an empty one ends.
            let mut units: Vec<u16> = (locations.iter())
                .flat_map(|text| text.encode_utf16().chain([0]))
                .collect();
            if !resolved || locations.is_empty() {
                units.push(0);
            }
            let units = units.iter().flat_map(|unit| unit.to_ne_bytes());
            truth(*resolved).into_iter().chain(units).collect()
        }
        VirtualDiskInfo::StorageType(storage_type) => {
            let mut bytes = storage_type.device_id.to_ne_bytes().to_vec();
            bytes.extend(guid_bytes(storage_type.vendor_id));
            bytes
        }
        VirtualDiskInfo::ProviderSubtype(number) | VirtualDiskInfo::PhysicalSectorSize(number) => {
            number.to_ne_bytes().to_vec()
        }
        VirtualDiskInfo::IsLoaded(value) => truth(*value),
    }
}

fn guid_bytes(id: Uuid) -> Vec<u8> {
    let (data1, data2, data3, data4) = id.as_fields();
    [
        &data1.to_ne_bytes()[..],
        &data2.to_ne_bytes(),
        &data3.to_ne_bytes(),
        data4,
    ]
    .concat()
}

package qupath.lib.projects

import qupath.lib.images.ImageData

class Project {

    boolean synced = false
    private List<ProjectImageEntry> entries = []

    List<ProjectImageEntry> getImageList() { new ArrayList<ProjectImageEntry>(entries) }

    ProjectImageEntry getEntry(ImageData imageData) { entries.find { it.data.is(imageData) } }

    ProjectImageEntry addImage(Object builder) {
        entries << new ProjectImageEntry(builder: builder)
        entries.last()
    }

    void syncChanges() { synced = true }

}
